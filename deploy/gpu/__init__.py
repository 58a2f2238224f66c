"""All that jest does on a GPU, measured by one command on a machine with one card: `bash deploy/gpu/check.sh OUT`.

bundle   packs what such a machine lacks
check    runs the pieces, each in a process of its own, and writes the page
piece    one piece: its process
results  what a piece measures, as lines of results.jsonl
timing   seconds and bytes on a device
page     results.jsonl -> page.md
pieces/  what is measured
"""
