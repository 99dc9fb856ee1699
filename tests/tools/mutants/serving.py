"""Mutants of the bank, the batcher and the server, as run.py says."""

ALONE = "tests/serving/engine/test_batcher.py::test_every_request_as_if_alone"
FAILING = "tests/serving/engine/test_failing_steps.py"
ILL = f"{FAILING}::test_a_failing_step_ends_the_row_that_fails"
OWN = "tests/serving/engine/test_faults.py::test_errors_stay_with_their_request"
BIASES = "tests/serving/bank/test_lora_bias.py"
GIVEN = f"{BIASES}::test_a_slot_is_given_to_others"
PAGED = "tests/serving/engine/test_paged.py"
SAMPLING = "tests/serving/engine/test_sampling.py"
LEFT = f"{SAMPLING}::test_draws_follow_what_transformers_leaves"
SCORED = "tests/serving/engine/test_scoring.py::test_a_prompts_tokens_are_scored_as_by_one_forward"
SLOTS = "tests/serving/bank/test_slots.py"
PEFT = "tests/serving/bank/test_bank.py::test_alone_equals_peft"
HTTP = "tests/serving/http"
REFUSED = f"{HTTP}/test_refused.py"
KEYS = f"{HTTP}/test_access.py::test_a_second_key_for_what_changes_the_server"
LINKS = f"{HTTP}/test_folder.py::test_links_lead_only_where_they_may"
PIECES = f"{HTTP}/test_detokenize.py::test_text_in_pieces_is_the_text"
FIRST_STOP = f"{HTTP}/test_detokenize.py::test_the_first_of_several_stop_strings_in_one_piece_ends_the_text"
WOKEN = f"{HTTP}/test_deliver.py"
LATER = f"{HTTP}/test_folder.py::test_what_was_unloaded_stays_so_while_its_folder_is_there"
LOADED = f"{HTTP}/test_server.py::test_load_replace_and_unload"

TESTS = (
    ALONE,
    PEFT,
    f"{SLOTS}::test_least_recently_used_makes_room",
    f"{HTTP}/test_server.py::test_completions_are_the_adapters",
)

MUTANTS = {
    "fastpeft/nn/slot_rank.py": {
        "slot_rank": {
            "smaller classes": ("max(8,", "max(4,", f"{SLOTS}::test_a_cpu_takes_similar_ranks_together"),
        },
    },
    "fastpeft/serving/bank/adapter.py": {
        "read_adapter": {
            "rsLoRA's scale": ("math.sqrt(r) if lora.rslora else r", "r", PEFT),
            "no scale of an embedding": (
                "* site.factor",
                "",
                "tests/serving/bank/test_models.py::test_rows_and_requests_are_their_adapters[Gemma3]",
            ),
            "the config's rank for all": ("r = lora.rank_of(site.path)", "r = lora.r", PEFT),
        },
        "_bias": {
            "a bias of B that is not scaled": (
                "scale * bias",
                "bias",
                f"{BIASES}::test_rows_of_a_mixed_batch_are_pefts",
            )
        },
    },
    "fastpeft/serving/bank/columns.py": {
        "Columns.write": {
            "who was there stays": ("self.values[slot].zero_()", "pass", GIVEN),
            "nobody has a row": (
                "self._mask |= bit",
                "pass",
                f"{BIASES}::test_rows_of_a_mixed_batch_are_pefts",
            ),
        },
    },
    "fastpeft/serving/bank/slots.py": {
        "Slots.bring": {
            "most recently used goes": (
                "key=lambda a: a.used",
                "key=lambda a: -a.used",
                f"{SLOTS}::test_least_recently_used_makes_room",
            ),
            "leased ones go": ("not a.pinned and not a.leases", "not a.pinned", f"{SLOTS}::test_bank_full"),
            "pinned ones go": ("not a.pinned and not a.leases", "not a.leases", f"{SLOTS}::test_bank_full"),
            "nobody is used": ("adapter.used = self._clock", "pass", f"{SLOTS}::test_least_recently_used_makes_room"),
        },
        "Slots._copy": {
            "gains of who was there": ("for site in self._sites", "for site in adapter.sites", GIVEN),
            "ranks of who was there": ("self._ranks[:, slot].copy_(adapter.ranks, non_blocking=True)", "pass", PEFT),
            "scales of who was there": ("table[:, slot].copy_(adapter.scales, non_blocking=True)", "pass", PEFT),
        },
    },
    "fastpeft/serving/bank/known.py": {
        "Known.release": {
            "leases never end": ("adapter.leases -= 1", "pass", f"{SLOTS}::test_a_lease_keeps_its_adapter"),
        },
    },
    "fastpeft/serving/engine/turns.py": {
        "Turns.taken": {
            "weights turned over": (
                "1.0 / self._weights.get(request.adapter, 1.0)",
                "self._weights.get(request.adapter, 1.0)",
                f"{PAGED}::test_turns_follow_the_weights",
            ),
        },
    },
    "fastpeft/serving/engine/paged_rows.py": {
        "PagedRows.step": {
            "the youngest is blamed": ("not out_of_memory(error)", "False", ILL),
            "all in halves when memory runs out": (
                "len(shares) == 1 or not out_of_memory(error)",
                "True",
                f"{FAILING}::test_memory_that_runs_out_ends_the_youngest",
            ),
        },
        "PagedRows._advance_apart": {
            "half of the rows are given up": (
                "(shares[:middle], shares[middle:])",
                "(shares[:middle],)",
                f"{FAILING}::test_a_row_that_is_tried_by_itself_is_tried_twice",
            ),
        },
        "PagedRows._give_back": {
            "what was read counts as read": (
                "row.blocks, row.cached = [], 0",
                "row.blocks = []",
                f"{PAGED}::test_blocks_that_run_out",
            ),
        },
        "PagedRows._advance": {
            "a token in the middle of a prompt": (
                "part.total == part.length for",
                "True for",
                f"{PAGED}::test_a_prompt_is_read_in_pieces_beside_the_others",
            ),
        },
        "_Row.next": {
            "positions from the start": ("ids, self.cached, self.length", "ids, 0, self.length", ALONE),
        },
    },
    "fastpeft/serving/engine/steps.py": {
        "Steps._deal": {
            "NaN ends nobody": ("elif token is None:", "elif False:", OWN),
        },
    },
    "fastpeft/serving/engine/sampling.py": {
        "next_tokens": {
            "NaN is a token": ("best > -torch.inf", "best != -torch.inf", OWN),
        },
        "_units": {
            "a tie with the last is left out": ("x < last.masked_fill", "x <= last.masked_fill", LEFT),
            "min_p of one": ("* units.amax(-1, keepdim=True)", "* _UNITS", LEFT),
            "one temperature": (
                "x /= _column([p.temperature for p in params], x)",
                "x /= params[0].temperature",
                f"{SAMPLING}::test_rows_do_not_depend_on_each_other",
            ),
        },
        "_pick_from_the_top": {
            "one more than top_p": (
                "ordered.cumsum(-1) - ordered >= limits",
                "ordered.cumsum(-1) - ordered > 2 * limits",
                LEFT,
            ),
        },
    },
    "fastpeft/serving/engine/scoring.py": {
        "_read": {
            "of the token itself": (
                "request.prompt[start + 1 : start + 1 + _CHUNK]",
                "request.prompt[start : start + _CHUNK]",
                SCORED,
            ),
        },
    },
    "fastpeft/serving/http/access.py": {
        "Access._refuse_without": {
            "any key": ("hmac.compare_digest(given, key)", "True", f"{REFUSED}::test_api_key"),
        },
        "Access.change": {
            "who may ask may load": (
                "self._refuse_without(self._admin, request, False)",
                "self._refuse_without(self._api, request, False)",
                KEYS,
            ),
        },
    },
    "fastpeft/serving/http/adapter_folder.py": {
        "AdapterFolder.resolve": {
            "links lead anywhere": ("if not self._is_inside(read):", "if False:", LINKS, f"{HTTP}/test_checkpoints.py"),
            "any part of a path": (
                "_NAME.fullmatch(part) is None for part",
                "False for part",
                f"{HTTP}/test_checkpoints.py::test_no_path_leads_out",
            ),
        },
        "AdapterFolder.path_of": {
            "what was unloaded is found again": ("name in self._unloaded or", "", LATER),
        },
        "AdapterFolder.unload": {
            "nobody notes it": ("self._unloaded.add(name)", "pass", LATER),
            "names that are in no folder are kept": ("if self.path_of(name) is not None:", "if True:", LATER),
        },
        "AdapterFolder._offer": {
            "what was loaded again counts as unloaded": ("self._unloaded.discard(name)", "pass", LATER),
            "loaded twice": ("name in self.bank and not replace", "False", LOADED),
        },
    },
    "fastpeft/serving/http/bodies.py": {
        "body_of": {
            "any type": (
                "if given != kind:",
                "if False:",
                f"{REFUSED}::test_what_a_web_page_may_send_unasked_is_refused",
            ),
            "no bound without a length": (
                "if len(body) > limit:",
                "if False:",
                f"{REFUSED}::test_a_body_without_a_length_is_cut_off_at_the_limit",
            ),
        },
    },
    "fastpeft/serving/http/detokenize.py": {
        "TextStream._cut": {
            "a stop string in two pieces": (
                "held = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)",
                "held = 0",
                PIECES,
            ),
            "the last that is named is not looked for": (
                "text.find(stop) for stop in self._stops",
                "text.find(stop) for stop in self._stops[:-1]",
                PIECES,
            ),
            "the last that is named is given out in parts": (
                "_overlap(text, stop) for stop in self._stops",
                "_overlap(text, stop) for stop in self._stops[:-1]",
                PIECES,
            ),
            "the last of several ends it": ("text[: min(found)]", "text[: max(found)]", FIRST_STOP),
            "the first that is named ends it": ("text[: min(found)]", "text[: found[0]]", FIRST_STOP),
        },
        "TextStream._decoded": {
            "half a character": ("text.endswith(_INCOMPLETE) and not last", "False", PIECES),
        },
    },
    "fastpeft/serving/http/service.py": {
        "Service.deliver": {
            "woken for each token": ("if not self._woken:", "if True:", WOKEN),
            "nobody notes that it was woken": ("self._woken = True", "pass", WOKEN),
        },
        "Service._hand_out": {
            "the mark is taken away at the end": (
                """self._woken = False while self._arrived: completion, token = self._arrived.popleft()
                completion.tokens.put_nowait(token)""",
                """while self._arrived:
            completion, token = self._arrived.popleft()
            completion.tokens.put_nowait(token)
        self._woken = False""",
                WOKEN,
            ),
            "the mark stays": ("self._woken = False", "pass", WOKEN),
            "one token of a step": ("while self._arrived:", "if self._arrived:", WOKEN),
        },
        "Service._begin": {
            "longer than the context": ("if max(new, 1) > room:", "if False:", f"{REFUSED}::test_too_large"),
            "where the next line begins": (
                ", *prompt.stops",
                "",
                f"{HTTP}/test_server.py::test_chat_without_a_template_is_plain_lines",
            ),
        },
    },
    "fastpeft/methods/serving_bits.py": {
        "_forward": {
            "the usual dtype": (
                "branch.lora_a.to(dtype), (0",
                "branch.lora_a, (0",
                "tests/methods/test_serving_bits.py",
            ),
            "its own rank": ("torch.tensor([served]", "torch.tensor([rank]", "tests/methods/test_serving_bits.py"),
            "no scale": ("torch.tensor([branch.scale]", "torch.tensor([1.0]", "tests/methods/test_serving_bits.py"),
            "nothing is dropped": (
                "[branch.dropout] if branch.dropout else None",
                "None",
                "tests/methods/test_serving_bits.py",
            ),
        },
        "serving_bits": {
            "never undone": ('layer.__dict__.pop("forward", None)', "pass", "tests/methods/test_serving_bits.py"),
        },
    },
}
