"""python -m pipelines.drawings --tier small --out deploy/data/small"""

import typer

from pipelines.drawings.build import main

typer.run(main)
