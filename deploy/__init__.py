"""Files, no code: run files and the small tier of the demonstration's data, installed with the package."""
