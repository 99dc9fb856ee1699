"""Mutants of whose turn it is, of rows and what is drawn for them, of steps that are repeated, as run.py says."""

ENGINE, HTTP = "tests/serving/engine", "tests/serving/http"
SIBLINGS = "tests/serving/bank/test_generate.py"
ALONE = f"{ENGINE}/test_batcher.py::test_every_request_as_if_alone"
PAGED = f"{ENGINE}/test_paged.py"
ROPE = f"{PAGED}::test_a_row_has_the_rope_of_its_own_length"
TURNS = f"{ENGINE}/test_turns.py"
FAILING = f"{ENGINE}/test_failing_steps.py"
TWICE = f"{FAILING}::test_a_step_of_one_row_is_tried_twice"
LOST = f"{FAILING}::test_nothing_is_tried_again_on_a_device_that_is_lost"
LOST_APART = f"{FAILING}::test_a_device_that_is_lost_while_rows_are_tried_apart"
TOGETHER = f"{PAGED}::test_prompts_of_one_length_are_read_together"
SAMPLING = f"{ENGINE}/test_sampling.py"
GREEDY = f"{SAMPLING}::test_greedy_is_the_first_of_the_largest"
PICK = f"{SAMPLING}::test_a_draw_falls_where_the_cumulated_units_pass_its_share"
IMPOSSIBLE = f"{SAMPLING}::test_rows_without_a_token_that_is_possible"
APART = f"{SAMPLING}::test_rows_do_not_depend_on_each_other"

TESTS = (TURNS, FAILING)
MUTANTS = {
    "fastpeft/serving/bank/shared_input.py": {
        "Siblings.forward": {
            "a changed tensor": ("version == x._version", "True", SIBLINGS),
            "another tensor": ("same is x", "True", SIBLINGS),
            "a group for ever": ("self._apart = True", "pass", SIBLINGS),
        },
        "Siblings._end": {
            "kept behind the call": ('pop("left", None)', 'get("left")', SIBLINGS),
            "outside of the call": ("self._thread.called = False", "pass", SIBLINGS),
        },
    },
    "fastpeft/serving/engine/admission.py": {
        "Admission.admit": {
            "one row too many of an adapter": (
                "held[request.adapter] >= self._adapter_rows",
                "held[request.adapter] > self._adapter_rows",
                f"{HTTP}/test_crowd.py::test_one_tenant_may_take_only_so_much",
            ),
        },
    },
    "fastpeft/serving/engine/pages.py": {
        "Pages.take": {
            "one block for all": ("self._free.pop()", "self._free[-1]", ALONE),
        },
        "Pages.give_back": {
            "blocks are lost": ("self._free += reversed(blocks)", "pass", f"{PAGED}::test_blocks_that_run_out"),
        },
        "blocks_for": {
            "a block too few": ("-(-tokens // BLOCK)", "tokens // BLOCK", ALONE),
        },
    },
    "fastpeft/serving/engine/row_rope.py": {
        "_RowByRow.__call__": {
            "the length of the piece": ("total - 1", "count - 1", ROPE),
        },
    },
    "fastpeft/serving/engine/turns.py": {
        "Turns.order": {
            "those who have left are kept": ("if self._due[adapter] <= self._clock:", "if False:", TURNS),
            "who leaves pays no debt": ("if self._due[adapter] <= self._clock:", "if True:", TURNS),
            "first come, first served": (
                "min(queues, key=lambda name: self._due.get(name, self._clock))",
                "next(iter(queues))",
                TURNS,
            ),
            "newcomers wait from the beginning": (
                "self._due.get(name, self._clock)",
                "self._due.get(name, 10 * self._clock)",
                TURNS,
            ),
            "those who have ended": ("if not request.done:", "if True:", TURNS),
            "the last first": ("yield queue.popleft()", "yield queue.pop()", TURNS),
            "skipped ones": ("if adapter not in skipped:", "if True:", TURNS),
        },
        "Turns.taken": {
            "the clock stands": ("self._clock = due", "pass", TURNS),
            "turns are saved up": (
                "max(self._due.get(request.adapter, self._clock), self._clock)",
                "self._due.get(request.adapter, 0.0)",
                TURNS,
            ),
            "a turn costs nothing": ("due + 1.0 /", "due + 0.0 /", TURNS),
        },
    },
    "fastpeft/serving/engine/sampling.py": {
        "next_tokens": {
            "greedy takes the least": ("logits.max(-1)", "logits.min(-1)", GREEDY),
            "greedy rows are drawn": ("request.params.temperature > 0", "True", GREEDY),
            "draws go to the first rows": ("tokens[drawn] =", "tokens[: len(drawn)] =", GREEDY),
            "the first rows are drawn from": ("_draw(logits[drawn],", "_draw(logits[: len(drawn)],", APART),
            "nothing is a token": ("best > -torch.inf", "best == best", IMPOSSIBLE),
        },
        "_draw": {
            "another row's number": ("u[every])", "u[: len(every)])", APART),
            "another row's units": ("_pick(units[every]", "_pick(units[: len(every)]", APART),
        },
        "_pick": {
            "excluded tokens at 0": ("right=True", "right=False", PICK),
            "the share of the first units": ("cumulated[:, -1:] * u", "cumulated[:, -2:-1] * u", PICK),
            "half of the draws": (">> _DRAW_BITS", ">> (_DRAW_BITS + 1)", PICK),
            "past the vocabulary": (".clamp(max=units.shape[1] - 1)", "", IMPOSSIBLE),
        },
    },
    "fastpeft/serving/engine/layout.py": {
        "Part.group": {
            "pieces of any length": ("(len(self.ids), self.cached)", "(2, self.cached)", TOGETHER),
            "pieces of any place": ("(len(self.ids), self.cached)", "(len(self.ids), 0)", TOGETHER),
            "each by itself": ("(len(self.ids), self.cached)", "(len(self.ids), id(self))", TOGETHER),
        },
    },
    "fastpeft/serving/engine/memory.py": {
        "device_lost": {
            "never": ("isinstance(error, torch.AcceleratorError)", "False", LOST),
            "always": ("isinstance(error, torch.AcceleratorError)", "True", TWICE),
        },
    },
    "fastpeft/serving/engine/steps.py": {
        "Steps._join": {
            "a prompt is read once": (
                "last or device_lost(error)",
                "True",
                f"{TWICE}[padded-ArithmeticError-its prompt]",
            ),
            "who fails alone is the last": (
                "last=len(requests) == 1",
                "last=True",
                f"{TWICE}[padded-ArithmeticError-its prompt]",
            ),
        },
    },
    "fastpeft/serving/engine/paged_rows.py": {
        "PagedRows.step": {
            "memory of one row": ("len(shares) == 1 or", "", f"{TWICE}[paged-OutOfMemoryError-a token]"),
            "a lost device is tried": ("if device_lost(error):", "if False:", LOST),
        },
        "PagedRows._advance_apart": {
            "a row is tried once": ("if not middle or", "if len(part) == 1 or", TWICE),
            "halves of a lost device": ("or device_lost(error)", "", LOST_APART),
        },
        "_Row.next": {
            "new tokens from the start": ("tokens[max(0, start) :", "tokens[0 :", f"{PAGED}"),
        },
    },
    "fastpeft/serving/engine/padded_rows.py": {
        "PaddedRows.step": {
            "memory of one row": ("len(self.requests) == 1 or", "", f"{TWICE}[padded-OutOfMemoryError-a token]"),
            "a lost device is tried": ("if device_lost(error):", "if False:", LOST),
        },
        "PaddedRows._advance_apart": {
            "a row is tried once": (
                "last=not middle",
                "last=len(part) == 1",
                f"{FAILING}::test_a_row_that_is_tried_by_itself_is_tried_twice",
            ),
            "halves of a lost device": ("last or device_lost(error)", "last", LOST_APART),
        },
    },
    "fastpeft/serving/engine/scoring.py": {
        "_read_or_again": {
            "once": ("if device_lost(error): raise", "raise", f"{ENGINE}/test_scoring.py"),
            "a lost device": ("if device_lost(error):", "if False:", f"{ENGINE}/test_scoring.py"),
        },
    },
}
