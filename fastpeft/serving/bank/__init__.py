"""The adapters of many tenants in the slots of one model."""
