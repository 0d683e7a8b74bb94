"""The messages and the stubs that are generated from proto/milepost/v1."""
