"""Partition policies: which rank keeps which parameters, and the two ways to train with the answer.

In reading order: assignment (what a policy returns), policies (by kind, bytes, count, cost, devices),
stage_split (the smallest largest stage), profile (measured costs), devices (machines of unequal speed and
memory), owner_sharding (each parameter kept by its owner), layer_parallel (each layer run by its owner).
"""
