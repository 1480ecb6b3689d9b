"""Every state change of every request, written as JSON lines, and what can be read from them.

`recorder.py` and `trace_file.py` write, in the engine's process; `reading.py`, `explain.py`,
`page.py` and `chrome.py` read, in the `fastserve` command.
"""
