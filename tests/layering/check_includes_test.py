# SPDX-License-Identifier: Apache-2.0
"""The include check sees what it is there to see."""

import tempfile
import unittest
from pathlib import Path

from check_includes import check

GOOD = {
    "version.hpp": "#pragma once\n",
    "core/error.hpp": "#include <string>\n",
    "cache/expert_store.hpp": '#include "sida/core/error.hpp"\n#include "sida/version.hpp"\n',
    "hash/hash_table.hpp": '#include "sida/core/error.hpp"\n#include <Eigen/Core>\n',
    "ffn/cpu/kernel.hpp": '#include "sida/ffn/slab_layout.hpp"\n',
    "ffn/slab_layout.hpp": "",
    "layer/offloaded_experts.hpp": '#include "sida/cache/expert_store.hpp"\n',
    "io/json.hpp": "#include <nlohmann/json.hpp>\n",
    "io.hpp": '#include "sida/io/json.hpp"\n',
    "sida.hpp": '#include "sida/layer/offloaded_experts.hpp"\n',
}


class CheckIncludes(unittest.TestCase):
    def problems(self, changes: dict[str, str]) -> list[str]:
        """The problems of the good tree with `changes` written over it."""
        with tempfile.TemporaryDirectory() as folder:
            for name, text in {**GOOD, **changes}.items():
                path = Path(folder) / "include" / "sida" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            return check(Path(folder))

    def test_a_tree_that_keeps_the_rules_has_no_problems(self) -> None:
        self.assertEqual(self.problems({}), [])

    def test_an_include_against_the_arrows_is_named(self) -> None:
        for header, include in [
            ("core/error.hpp", "sida/cache/expert_store.hpp"),
            ("cache/expert_store.hpp", "sida/hash/hash_table.hpp"),
            ("hash/hash_table.hpp", "sida/cache/expert_store.hpp"),
            ("ffn/cpu/kernel.hpp", "sida/cache/expert_store.hpp"),
            ("layer/offloaded_experts.hpp", "sida/io/json.hpp"),
            ("io/json.hpp", "sida/layer/offloaded_experts.hpp"),
            ("sida.hpp", "sida/io/json.hpp"),
            ("io.hpp", "sida/core/error.hpp"),
        ]:
            for text in (f'#include "{include}"\n', f"  #  include <{include}>\n"):
                problems = self.problems({header: text})
                self.assertEqual(len(problems), 1, (header, problems))
                self.assertTrue(problems[0].startswith(f"{header}: includes {include}, but"))

    def test_json_cuda_and_conditions_stay_where_they_belong(self) -> None:
        for text in (
            "#include <nlohmann/json.hpp>",
            "#include <cuda_runtime.h>",
            "#include <cublas_v2.h>",
            "#ifdef SIDA_HAS_CUDA\n#endif",
            "#if defined(__CUDACC__)\n#endif",
            '#include "error.hpp"',
            '#include "sida/core/missing.hpp"',
            '#include "sida/sida.hpp"',
        ):
            self.assertEqual(len(self.problems({"cache/expert_store.hpp": text})), 1, text)

    def test_headers_lie_in_known_folders(self) -> None:
        self.assertEqual(len(self.problems({"util/misc.hpp": ""})), 1)
        self.assertEqual(len(self.problems({"misc.hpp": ""})), 1)

    def test_a_tree_without_headers_is_a_problem(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(len(check(Path(folder))), 1)


if __name__ == "__main__":
    unittest.main()
