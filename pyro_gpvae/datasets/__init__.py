"""Images that ship inside the package; `README.md` beside them states their provenance."""
