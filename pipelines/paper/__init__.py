"""The demonstration, and the paper's figures at a small scale. Nothing else imports this package.

drawings   the demonstration's data, built out of published packages
records    what the runs gave, as results.json keeps it, and the figures of experiments.yaml
charts     records -> charts
figures    records -> tables, a page, a README
reproduce  `jest reproduce`: the paper's figures, each a few runs
demo       `jest demo`: every stage in order
"""
