"""Cells of tables, and readers of what tables are printed as."""

import re
from html.parser import HTMLParser

import numpy as np
from storing import config, frame, put
from visibench.results.store.records import ScoreRecord, VisualTokens

HOSTILE = r"a_b%c&d#$e{f}~^\g<script>alert(1)</script>"


def answered(store, method, right, tokens=8.0, task="gqa", label=None, seed=0, **changes):
    """A cell whose questions, three about each image, are answered right where ``right`` says so."""
    samples = frame([f"i{i // 3}" for i in range(len(right))], right)
    score = ScoreRecord(key="exact_match", title="exact match", value=float(np.mean(right)), maximum=1)
    visual = VisualTokens(prompt=16, per_layer=[tokens, tokens])
    cell = config(method, task, seed, label=label or method, **changes)
    return put(store, cell, samples=samples, scores=[score], visual_tokens=visual, size=len(right), total=750)


def fields(line):
    """Entries of a line of a LaTeX table."""
    return re.split(r"(?<!\\)&", line.removesuffix(r" \\"))


class Reader(HTMLParser):
    """Rows of a page's tables as text; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows = [], set(), []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
