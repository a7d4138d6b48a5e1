"""Layers and models of many kinds, each judged against one example at a time in float64."""
