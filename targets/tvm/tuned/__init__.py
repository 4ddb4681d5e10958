"""The tuning database that gfcompile ships: what `gfcompile tune` found for the zoo, as JSON."""
