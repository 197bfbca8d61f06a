"""The smallest honest taskd plugin."""
