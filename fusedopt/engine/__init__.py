"""When things happen: steps, state that is made on the way, checkpoints, torch.compile. No equation is known here."""
