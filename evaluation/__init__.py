"""Performance estimation: how good and how costly is this `nn.Module`? Imports no sibling."""
