"""The engine: everything between a preference pair and an updated policy; never imports from the root."""
