"""pytest plugin: print how many specializations of the Triton kernel a run's launches would compile on a card."""

import pytest

SEEN = set()


def pytest_configure(config):
    from snpatch.kernels import patched_glu as module

    kernel = module._patched_glu_kernel

    class Counted:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                aligned = tuple(a % 16 == 0 for a in (args[11], args[12]))  # n_neurons and row_stride
                SEEN.add((args[0].dtype, *aligned, *sorted((n, str(v)) for n, v in constants.items())))
                return kernel[grid](*args, **constants)

            return launch

    module._patched_glu_kernel = Counted()


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"specializations: {len(SEEN)} ")
