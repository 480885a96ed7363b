"""Models: PaLM, its adapters and cache, what a trainer sees of any model, and how they are kept."""
