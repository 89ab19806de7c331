"""Adapters that give other libraries' attention modules our mechanisms."""
