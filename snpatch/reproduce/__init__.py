"""The paper in one command: trains or takes the pairs, contrasts, runs every experiment, reports beside the paper's."""
