"""The order form: what a caller may ask, what comes back, what a model allows, what can go wrong.

The only door between the floors; it imports nothing of ours.
"""
