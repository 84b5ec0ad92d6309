"""How values are kept between steps: formats of states, 8-bit codes, master weights, the memory they live in."""
