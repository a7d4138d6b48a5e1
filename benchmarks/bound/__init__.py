"""Hostile inputs to every kind of layer: is a contribution ever longer than C?"""
