"""taskd runs functions later, reliably."""
