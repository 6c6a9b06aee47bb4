"""The GPU path on one device, in one go: ``python -m bench.gpu``. Needs neither Ray nor Hydra."""
