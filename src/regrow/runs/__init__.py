"""One run: launched, recorded, loaded again, evaluated and predicted with."""
