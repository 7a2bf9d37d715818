"""LM-Steer (Han et al., ACL 2024). Start at `steer`."""
