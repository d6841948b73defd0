"""From rows in files to batches: sources, formatting, tokenisation, label noise, loader, reference cache."""
