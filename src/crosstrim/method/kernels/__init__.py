"""One operation a stem: the reference in torch, the same in Triton, and the choice between them."""
