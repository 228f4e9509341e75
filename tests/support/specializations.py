"""pytest plugin that prints how many specializations of the Triton kernel a run would compile on a card."""

import pytest

SPECIALIZATIONS = set()


def pytest_configure(config):
    from snpatch.kernels import patched_glu as module

    kernel = module._patched_glu_kernel

    class CountingKernel:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                aligned = tuple(a % 16 == 0 for a in (args[11], args[12]))  # n_neurons and row_stride
                SPECIALIZATIONS.add((args[0].dtype, *aligned, *sorted((n, str(v)) for n, v in constants.items())))
                return kernel[grid](*args, **constants)

            return launch

    module._patched_glu_kernel = CountingKernel()


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"specializations: {len(SPECIALIZATIONS)} ")
