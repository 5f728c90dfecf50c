"""A score method in a single file: visibench run --method examples/my_method.py:largest_norm:keep=0.25 …"""

from visibench.methods import Scored, register


@register("largest_norm", "Largest norm")
class LargestNorm(Scored):
    """Keep the projected tokens of largest norm."""

    hook_points = ("projector",)

    def score(self, view):
        return view.projected.norm(dim=2)
