"""Generator of the files with which cluster schedulers run launch.pretrain; submits nothing."""
