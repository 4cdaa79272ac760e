"""`python -m models.generate PATH --prompt ...`; from Python, `models.generate(...)` (models/generation.py)."""

if __name__ == "__main__":
    from models.hub.cli import main

    main()
