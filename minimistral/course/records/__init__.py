"""The exercise records: one module chNN.py for each written chapter, with a list EXERCISES."""
