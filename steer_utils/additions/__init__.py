"""Activation additions and x-vectors: Turner et al. 2023, "Activation Addition", arXiv:2308.10248."""
