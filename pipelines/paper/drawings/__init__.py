"""The demonstration's data: real drawings with the names that people gave them, out of published packages.

names     names as words, slugs and hashes
packages  the published packages: which, for which tier, and fetched
icons     icon sets as Iconify's packages hold them
emoji     emoji by their names in each language
clip_art  clip art and stamps
rows      which pairs a tier has
pictures  rows drawn
build     shards as img2dataset writes them
place     a tier below a root
"""
