"""PPLM (Dathathri et al., ICLR 2020). Start at `steer`."""
