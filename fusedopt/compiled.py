def step(optimizer):
    raise NotImplementedError
