"""Sources in their published layouts -> manifests, spoken conversations and codec codes."""
