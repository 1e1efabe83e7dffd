"""Everything that can be wrong is found here, before processes connect."""
