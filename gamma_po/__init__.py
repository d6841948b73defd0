"""γ-PO: preference optimization with per-pair target margins, in PyTorch Lightning."""

__version__ = "0.1.0"
