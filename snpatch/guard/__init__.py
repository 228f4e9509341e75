"""Guards: classifiers that predict a harmful completion from the neurons at a prompt's last token."""
