"""python -m pipelines.paper.drawings --tier small --out deploy/data/small"""

import typer

from .build import main

typer.run(main)
