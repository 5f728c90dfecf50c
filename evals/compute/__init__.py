"""What a prefill costs: counted (flops), by the papers' formulas (paper_flops), planned without weights (prefill_plan),
timed (timing, profile), in memory (memory), and solved for (budget).
"""
