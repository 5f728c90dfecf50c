"""A method in a file that does something odd where it is asked."""

from pathlib import Path

SOURCE = """
import sys
from visibench.methods import Keep, Method, register
from visibench.engine.contract import Forward
{module}
@register("odd", "Odd")
class Odd(Method):
    hook_points = ("decoder",)
    def __post_init__(self):
        {post_init}
        super().__post_init__()
    def check(self, geometry):
        {check}
    def begin(self, layout, geometry):
        {begin}
        return InUse()
class InUse(Forward):
    def layer_input(self, layer, view):
        {layer_input}
        return None
"""
PLACES = {"module": 2, "post_init": 2, "check": 2, "begin": 3, "layer_input": 3}
"""Where others' code runs, and how a run ends whose method fails there."""


def written(place, does):
    lines = dict.fromkeys(PLACES, "pass") | {place: does}
    Path("odd.py").write_text(SOURCE.format(**lines))
