"""What a finished run looks like: one self-contained `report.html` and a short table for the terminal.

The room is handed `ReportFacts` (facts.py) and draws them; it trains nothing, measures nothing and looks nothing up.
A part that was not measured is `None` and the page says so in a sentence; equal facts give byte-identical output.
"""
