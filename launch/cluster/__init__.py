"""Jobs for clusters: what a scheduler is given to run launch.pretrain on a pod. Never submits."""
