"""The demonstration's data: real drawings with the names that people gave them, out of published packages.

sources: packages and icon sets;  rows: what is listed;  pictures: rendered;  build: shards as img2dataset writes them.
"""
