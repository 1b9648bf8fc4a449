//! What templates may do, what they may name, and what stops them.

use std::{collections::HashMap, rc::Rc};

use serde_json::{Value, json};

use super::*;

fn scope<'a>() -> Scope<'a> {
    Scope {
        stage: Some("spec"),
        stages: vec!["design", "test-plan", "spec", "later"],
        upstream: ["design", "test-plan"].into_iter().collect(),
        outputs: Rc::new(HashMap::new()),
        input: Some(Rc::new(["brief", "title"].into_iter().collect())),
        run: true,
        output: false,
        strict: true,
    }
}

fn input() -> Value {
    json!({"brief": "<a> & b", "title": "T", "n": 3, "list": [1, 2, {"b": 1, "a": null}], "on": true, "long": "x".repeat(500_000)})
}

fn run<T>(render: impl FnOnce(&Vars<'_>) -> T) -> T {
    let (input, design, plan) = (input(), json!({"title": "D", "items": ["p", "q"]}), json!("plain\ntext"));
    let (input, design, plan) = (Arc::new(input), Arc::new(design), Arc::new(plan));
    let stage = |id: &str| match id {
        "design" => Some(&design),
        "test-plan" => Some(&plan),
        _ => None,
    };
    render(&Vars { run_id: "r-1", input: &input, stage: &stage, output: Some(&design) })
}

fn open<'a>() -> Scope<'a> {
    Scope { input: None, ..scope() }
}

fn render(text: &str) -> Result<String, String> {
    let template = Template::text(text, &open()).unwrap_or_else(|flaws| panic!("{text}: {flaws:?}"));
    run(|vars| template.render(vars))
}

fn flaws(text: &str) -> Vec<Flaw> {
    Template::text(text, &scope()).map(|_| ()).expect_err(text)
}

#[test]
fn texts_are_inserted_as_they_are_and_json_as_json() {
    assert_eq!(render("{{ input.brief }}").as_deref(), Ok("<a> & b"));
    assert_eq!(
        render("{{ input.list }}|{{ input.n }}|{{ input.on }}").as_deref(),
        Ok(r#"[1,2,{"a":null,"b":1}]|3|true"#)
    );
    assert_eq!(render("{{ stages.design.output }}").as_deref(), Ok(r#"{"items":["p","q"],"title":"D"}"#));
    assert_eq!(render("{{ stages['test-plan'].output }}!{{ run.id }}").as_deref(), Ok("plain\ntext!r-1"));
    assert_eq!(
        render("{{ stages.design.output['items'] | tojson(indent=2) }}").as_deref(),
        Ok("[\n  \"p\",\n  \"q\"\n]")
    );
}

#[test]
fn the_language_is_that_of_jinja() {
    for (template, text) in [
        ("{% for x in stages.design.output['items'] %}{{ loop.index }}.{{ x | upper }} {% endfor %}", "1.P 2.Q "),
        ("{% set a, b = [1, 2] %}{{ a + b * 2 - 1 }}", "4"),
        ("{% if input.n > 2 and 'a' in input.brief %}yes{% elif false %}no{% else %}no{% endif %}", "yes"),
        ("{{ input.list | length }} {{ 'a' ~ 1 ~ 'b' }} {{ [1, 2] + [3] }}", "3 a1b [1,2,3]"),
        ("{{ input.missing | default('none') }} {{ input.missing is defined }}", "none false"),
        (
            "{{ 'a,b' | split(',') | join(' and ') }} {{ 'x-y' | replace('-', '+') }} {{ '  t ' | trim }}",
            "a and b x+y t",
        ),
        ("{{ input.list | selectattr('b') | map(attribute='b') | list if false else 'skipped' }}", "skipped"),
        ("{{ ['b', 'a', 'b'] | unique | sort | join }} {{ [1, 2.5] | sum }} {{ [3, 1] | min }}", "ab 3.5 1"),
        (
            "{% with y = 'w' %}{{ y }}{% endwith %}{% filter upper %}f{% endfilter %}{% set z %}c{{ 1 }}{% endset %}{{ z }}",
            "wFc1",
        ),
        ("{% for i in range(5) if i is even %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% raw %}{{ x }}{% endraw %}{# note #}{{ 'a\nb' | indent(2) }}", "{{ x }}a\n  b"),
        ("{{ {'k': (1, 2)} }} {{ 'abc'[1:] }} {{ -input.n }} {{ 7 // 2 }} {{ 2 ** 3 }}", r#"{"k":[1,2]} bc -3 3 8"#),
        ("{% for k, v in {'a': 1} | dictsort %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        ("no tags at all\n", "no tags at all"),
        ("", ""),
    ] {
        assert_eq!(render(template).as_deref(), Ok(text), "{template}");
    }
}

#[test]
fn methods_and_filters_are_those_that_people_know() {
    for (expression, text) in [
        ("'aB'.upper() ~ 'aB'.lower() ~ 'a b'.title() ~ 'aB'.capitalize()", "ABabA BAb"),
        ("' x '.strip() ~ '|' ~ 'xxaxx'.strip('x') ~ 'xa'.lstrip('x') ~ 'ax'.rstrip('x')", "x|aaa"),
        ("'a,b,c'.split(',', 1)", r#"["a","b,c"]"#),
        ("' a  b c '.split() ", r#"["a","b","c"]"#),
        ("'a b  c'.split(none, 1)", r#"["a","b  c"]"#),
        ("'a.b.c'.rsplit('.', 1)", r#"["a.b","c"]"#),
        ("'a b c'.rsplit(none, 1)", r#"["a b","c"]"#),
        ("'a\r\nb'.splitlines()", r#"["a","b"]"#),
        ("'abab'.replace('a', 'x') ~ 'abab'.replace('a', 'x', 1)", "xbxbxbab"),
        ("'abc'.startswith('ab') and 'abc'.endswith(['x', 'c']) and not 'abc'.startswith('b')", "true"),
        ("'pre-a'.removeprefix('pre-') ~ 'a.md'.removesuffix('.md')", "aa"),
        ("'\u{fc}ab'.find('b') ~ 'x'.find('y') ~ 'aXa'.count('a')", "2-12"),
        ("', '.join(['a', 1, {'k': none}])", r#"a, 1, {"k":null}"#),
        (
            "'12'.isdigit() ~ 'a1'.isalpha() ~ 'a1'.isalnum() ~ ' '.isspace() ~ 'A'.isupper() ~ 'A'.islower()",
            "truefalsetruetruetruefalse",
        ),
        ("{'b': 1, 'a': 2}.items()", r#"[["a",2],["b",1]]"#),
        ("{'b': 1, 'a': 2}.keys() ~ {'b': 1, 'a': 2}.values()", r#"["a","b"][2,1]"#),
        ("input.get('n') ~ input.get('zz') ~ input.get('zz', 'other')", "3nullother"),
        ("[1, 2, 1].count(1) ~ [1, 2].index(2)", "21"),
        ("'one two three' | truncate(7)", "one..."),
        ("'one two three' | truncate(8, true, '\u{2026}', leeway=0)", "one two\u{2026}"),
        ("'short' | truncate(3)", "short"),
        ("'one, two_2 three!' | wordcount", "3"),
        ("[1, 2, 3] | batch(2, 0)", "[[1,2],[3,0]]"),
        ("'%s: %.2f %d %%' | format({'a': true}, 1.5, 3)", r#"{"a":true}: 1.50 3 %"#),
        ("'%(a)s' | format(a=[1])", "[1]"),
        ("('{\"a\": [1, 2.50]}' | fromjson).a[1]", "2.5"),
        ("'2026-11-29' | regex_replace('(\\\\d+)-(\\\\d+)', '\\\\2/\\\\1')", "11/2026-29"),
        ("'aAa' | regex_replace('a', '$1', ignorecase=true, count=2)", "$1$1a"),
        ("[{'k': 'x'}, {'k': 1}] | join('+', attribute='k')", "x+1"),
    ] {
        assert_eq!(render(&format!("{{{{ {expression} }}}}")).as_deref(), Ok(text), "{expression}");
    }
    for wrong in [
        "1.upper()",
        "[].upper()",
        "input.zz.upper()",
        "'a'.split('')",
        "'a'.startswith(1)",
        "'a'.upper(1, 2)",
        "'a'.split(sep=',')",
        "[1] | batch(0)",
        "('%9999d' ~ '') | format(1)",
        "('%*d' ~ '') | format(9, 1)",
        "'{' | fromjson",
        "'a' | truncate(lenght=3)",
        "'a' | regex_replace(input.brief ~ '(', '')",
        "[1].index(2)",
    ] {
        let error = render(&format!("{{{{ {wrong} }}}}")).expect_err(wrong);
        assert!(!error.is_empty() && error.len() < 300, "{wrong}: {error}");
    }
}

#[test]
fn an_if_without_else_is_empty_unless_one_asks_whether_it_is_there() {
    for (template, text) in [
        ("a{{ 'x' if input.n == 2 }}b", "ab"),
        ("a{{ 'x' if input.n == 3 }}b", "axb"),
        ("{{ 'p' ~ ('x' if false) ~ 'q' }}", "pq"),
        ("{{ ('x' if false) | default('y') }}{{ ('x' if false) is defined }}", "yfalse"),
        ("{% for x in (input.list if false) %}{{ x }}{% else %}none{% endfor %}", "none"),
        ("{% set v = 1 if false %}[{{ v }}]", "[]"),
        ("{{ ['a', 'b' if false] | join('-') }}", "a-"),
    ] {
        assert_eq!(render(template).as_deref(), Ok(text), "{template}");
    }
    let template = Template::text("{{ 'x' if false }}", &open()).expect("valid");
    assert_eq!(run(|vars| template.value(vars)), Ok(json!("")), "in an output mapping too");
}

#[test]
fn data_becomes_the_same_text_in_whichever_way_it_is_made() {
    let json = r#"[1,2,{"a":null,"b":1}]"#;
    for template in [
        "{{ input.list }}",
        "{{ '' ~ input.list }}",
        "{{ input.list ~ '' }}",
        "{{ [input.list] | join }}",
        "{{ ''.join([input.list]) }}",
        "{{ input.list | string }}",
        "{{ input.list | tojson }}",
        "{{ '%s' | format(input.list) }}",
        "{% for x in [input.list] %}{{ x }}{% endfor %}",
        "{% set t %}{{ input.list }}{% endset %}{{ t }}",
        "{% filter trim %}{{ input.list }}{% endfilter %}",
    ] {
        assert_eq!(render(template).as_deref(), Ok(json), "{template}");
    }
    assert_eq!(render("{{ none ~ true ~ 1.5 ~ 'a' }}").as_deref(), Ok("nulltrue1.5a"));
    assert!(render("{{ 'a' ~ input.missing }}").expect_err("missing").contains("missing"));
}

#[test]
fn a_key_that_may_be_left_out_needs_a_default_or_a_condition() {
    let keys = ["brief", "note"].into_iter().collect::<Keys<'_>>().optional(|key| key == "note");
    let outputs = ["items", "extra"].into_iter().collect::<Keys<'_>>().optional(|key| key == "extra");
    let outputs = Rc::new(HashMap::from([("design", outputs)]));
    let scope = Scope { input: Some(Rc::new(keys)), outputs, ..scope() };
    for good in [
        "{{ input.brief }}{{ stages.design.output['items'] }}",
        "{{ input.note | default('none') }}{{ input.note | d('') | upper }}",
        "{% if input.note is defined %}{{ input.note }}{% endif %}",
        "{% if input.note is not defined %}none{% else %}{{ input.note }}{% endif %}",
        "{% if input.note is undefined %}none{% elif input.brief %}{{ input.note }}{% endif %}",
        "{% if input.note is defined and input.note == 'x' %}{% endif %}",
        "{% if input.note is undefined or input.note == 'x' %}{% endif %}",
        "{% if 'note' in input %}{{ input.note }}{% endif %}{% if 'note' not in input %}{% else %}{{ input.note }}{% endif %}",
        "{% if input.note | default(false) %}{{ input.note }}{% endif %}",
        "{% if input.get('note') %}{{ input.note }}{% endif %}{{ input.get('note', 'x') }}",
        "{{ input.note if input.note is defined else 'x' }}{{ input['note'] if input.note is defined }}",
        "{% if stages.design.output.extra is defined %}{{ stages.design.output.extra.deep }}{% endif %}",
    ] {
        assert!(Template::text(good, &scope).is_ok(), "{good}: {:?}", Template::text(good, &scope));
        assert!(Template::text(good, &Scope { strict: false, ..scope.clone() }).is_ok(), "{good}");
    }
    for bad in [
        "{{ input.note }}",
        "{% if input.note %}{% endif %}",
        "{{ input.note.deep | default('x') }}",
        "{{ 'x' if input.note }}",
        "{% for x in input.note %}{% endfor %}",
        "{% if input.note is defined %}{% endif %}{{ input['note'] }}",
        "{% if input.note is defined or input.brief %}{{ input.note }}{% endif %}",
        "{{ stages.design.output.extra }}",
        "{{ [1] | select('eq', input.note) | list }}",
    ] {
        let flaws = Template::text(bad, &scope).expect_err(bad);
        assert_eq!(flaws.len(), 1, "{bad}: {flaws:?}");
        let mend = flaws[0].mend.as_deref().unwrap_or_default();
        assert!(
            flaws[0].message.contains("may be left out") && mend.contains("default") && mend.contains("required"),
            "{bad}: {flaws:?}"
        );
        assert!(Template::text(bad, &Scope { strict: false, ..scope.clone() }).is_ok(), "stored ones go on: {bad}");
    }
}

#[test]
fn what_the_release_before_cannot_render_is_known() {
    let newest = |text: &str| Template::text(text, &open()).expect("valid").newest().map(str::to_owned);
    assert_eq!(newest("{{ input.brief | upper | join(', ') }}{{ 1 if true else 2 }}"), None);
    for new in [
        "{{ 'a'.upper() }}",
        "{{ 'a' | truncate }}",
        "{{ 1 if true }}",
        "{{ [] | join('', attribute='a') }}",
        "{{ [] | join(d=', ') }}",
        "{{ [] | join(*input.list) }}",
    ] {
        assert!(newest(new).is_some(), "{new}");
    }
}

#[test]
fn a_format_is_refused_for_its_widths_alone() {
    let shown = |text: &str| render(text).expect(text);
    assert_eq!(
        shown("{{ '2026*: %s of %05.1f at 100%% 20261129' | format('a', 2.25) }}"),
        "2026*: a of 002.2 at 100% 20261129"
    );
    assert_eq!(shown("{{ '%(year2026)s' | format(year2026='x') }}"), "x");
    for bad in ["%1000s", "%.1000f", "%*d", "%-+1000d", "%(a)1000s"] {
        assert!(render(&format!("{{{{ ('' ~ '{bad}') | format(1, 2, a=3) }}}}")).is_err(), "{bad}");
        let flaws = Template::text(&format!("{{{{ '{bad}' | format(1) }}}}"), &open()).expect_err(bad);
        assert!(flaws[0].message.contains("at most 3 digits"), "{flaws:?}");
    }
}

#[test]
fn what_a_text_of_json_makes_is_paid_for() {
    let parse = |text: &str| {
        let template = Template::text("{{ input.json | fromjson | length }}", &open()).expect("valid");
        let input = Arc::new(json!({ "json": text }));
        template.render(&Vars { run_id: "r", input: &input, stage: &|_| None, output: None })
    };
    assert_eq!(parse("[1, 2]").as_deref(), Ok("2"));
    let maps = format!("[{}{{}}]", "{\"a\":{}},".repeat(400_000));
    let why = parse(&maps).expect_err("small as a text, large as values");
    assert!(why.contains("bytes of data") || why.contains("values"), "{why}");
}

#[test]
fn a_missing_value_is_named_when_it_is_used() {
    let error = render("one\n{{ stages.design.output.nope }}").expect_err("missing");
    assert!(error.contains("line 2") && error.contains("nope"), "{error}");
    let error = render("{{ input.list | map(attribute='zz') | join(',') }}").expect_err("missing");
    assert!(!error.is_empty(), "{error}");
    let error = render("{% for x in input.absent %}{% endfor %}").expect_err("missing");
    assert!(error.contains("absent"), "{error}");
}

#[test]
fn an_output_that_is_not_there_yet_is_named() {
    let scope = Scope { upstream: ["later"].into_iter().collect(), ..scope() };
    let template = Template::text("{{ stages.later.output }}", &scope).expect("valid");
    assert_eq!(run(|vars| template.render(vars)), Err("the output of stage `later` is not there yet".to_owned()));
}

#[test]
fn everything_that_will_not_be_there_is_told_with_what_to_write() {
    for (template, message, mend) in [
        ("{{ inptu.brief }}", "no `inptu`", "did you mean `input`?"),
        ("{{ brief }}", "no `brief`", "write `input.brief`"),
        ("{{ design }}", "no `design`", "write `stages.design.output`"),
        ("{{ input.breif }}", "no `breif`", "did you mean `input.brief`?"),
        ("{{ input['other'] }}", "no `other`", "add it to the input's `properties`"),
        ("{{ stages.desing.output }}", "no stage `desing`", "did you mean `stages.design.output`?"),
        ("{{ stages.test-plan.output }}", "no stage `test`", "write `stages['test-plan'].output`"),
        ("{{ stages.later.output }}", "`later` is not upstream", "add `later` to `needs`"),
        ("{{ stages.spec.output }}", "its own output", "before it"),
        ("{{ stages.design.result }}", "no `result`", "write `stages.design.output`"),
        ("{{ stages.design }}", "without `.output`", "stages.id.output"),
        ("{{ stages[input.title].output }}", "without the id", "stages.id.output"),
        ("{% for s in stages %}{% endfor %}", "without the id", "stages.id.output"),
        ("{{ run.secret }}", "nothing but its id", "run.id"),
        ("{{ output }}", "no `output`", "`input`, `stages`, `run`"),
        ("{% set input = 1 %}", "`input` is taken", "another name"),
        ("{{ 'a' | uper }}", "no filter `uper`", "did you mean `upper`?"),
        ("{{ 1 is evn }}", "no test `evn`", "did you mean `even`?"),
        ("{{ 'a'.uper() }}", "no method `uper`", "did you mean `upper`?"),
        ("{{ input.brief.append(1) }}", "no method `append`", "list + [item]"),
        ("{{ 'a'.truncate(3) }}", "no method `truncate`", "value | truncate"),
        ("{{ debug() }}", "cannot be called", "range"),
        ("{{ upper('a') }}", "cannot be called", "value | upper"),
        ("{{ input.due-date }}", "`input.due-date` reads as a subtraction", "input['due-date']"),
        ("{{ 'a' | regex_replace('(?!b)', '') }}", "look-around", "what must match"),
        ("{{ namespace(a=1) }}", "cannot be called", "range"),
        ("{% for x in [1] %}{% endfor %}{{ x }}", "no `x`", "known are"),
        ("{% autoescape true %}{% endautoescape %}", "does not exist", "known are"),
        ("{% for x in [] recursive %}{% endfor %}", "does not exist", "known are"),
    ] {
        let found = flaws(template);
        let [flaw] = found.as_slice() else { panic!("{template}: {found:?}") };
        let told = flaw.mend.as_deref().unwrap_or_default();
        assert_eq!(flaw.code, Code::TemplateReference, "{template}");
        assert!(flaw.message.contains(message) && told.contains(mend), "{template}: {} ({told})", flaw.message);
    }
    assert_eq!(flaws("{{ a }}\n{{ b }}{{ input.c }}").len(), 3);
}

#[test]
fn what_does_not_parse_says_where() {
    for template in [
        "{{ a",
        "{% if x %}",
        "a\n{{ }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% macro m() %}{% endmacro %}",
        "{% extends 'x' %}",
        "{% block b %}{% endblock %}",
    ] {
        let found = flaws(template);
        assert_eq!(found.iter().map(|f| f.code).collect::<Vec<_>>(), [Code::TemplateSyntax], "{template}");
        assert!(found[0].line >= 1, "{template}");
    }
    assert_eq!(flaws("a\nb\n{{ }}")[0].line, 3);
}

#[test]
fn a_single_expression_keeps_its_type() {
    let value = |text: &str| {
        let template = Template::text(text, &open()).expect("valid");
        run(|vars| template.value(vars))
    };
    assert_eq!(value("{{ stages.design.output }}"), Ok(json!({"items": ["p", "q"], "title": "D"})));
    assert_eq!(value("{{ input.n + 1 }}"), Ok(json!(4)));
    assert_eq!(value("{{ input.on }}"), Ok(json!(true)));
    assert_eq!(value(" {{ input.n }}"), Ok(json!(" 3")));
    assert_eq!(value("plain"), Ok(json!("plain")));
    assert!(value("{{ input.none }}").is_err());
}

#[test]
fn expressions_judge_an_output() {
    let holds = |text: &str| {
        let expression = Template::expression(text, &Scope { run: false, output: true, ..open() }).expect("valid");
        run(|vars| expression.holds(vars))
    };
    assert_eq!(holds("output['items'] | length == 2 and output.title != input.title"), Ok(true));
    assert_eq!(holds("'z' in output['items']"), Ok(false));
    assert!(holds("output.title").expect_err("text").contains("not true or false"));
    assert!(holds("output.nope > 1").is_err());
    assert!(Template::expression("run.id == 'x'", &Scope { run: false, output: true, ..scope() }).is_err());
    assert!(Template::expression("output ==", &scope()).is_err());
    assert!(Template::expression("{{ output }}", &Scope { output: true, ..scope() }).is_err());
}

#[test]
fn what_runs_away_is_stopped() {
    let doubled = "{% set a = a ~ a %}".repeat(60);
    let doubled_lists = "{% set a = [a, a] %}".repeat(50);
    let nested = "{% set a = [a] %}".repeat(200);
    let copies = "{% set c = input.long[1:] %}".repeat(1000);
    for template in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{{ b }}{% endfor %}{% endfor %}".to_owned(),
        "{% for a in range(1000000000) %}{% endfor %}".to_owned(),
        "{{ 'x' * 1000000000 }}".to_owned(),
        "{{ [1] * 1000000000 }}".to_owned(),
        format!("{{% set a = 'xxxxxxxxxxxxxxxx' %}}{doubled}{{{{ a }}}}"),
        format!("{{% set a = 'x' %}}{doubled_lists}{{{{ a == a }}}}"),
        format!("{{% set a = 1 %}}{nested}{{{{ a }}}}"),
        copies,
        "{{ input.long | replace('x', input.long) }}".to_owned(),
        "{{ input.long | split('') | join(input.long) }}{{ range(99999) | join(input.long) }}".to_owned(),
        "{% set t %}{% for a in range(99999) %}{{ input.long }}{% endfor %}{% endset %}".to_owned(),
        format!("{{% set t %}}{{% for a in range(50000) %}}{}{{% endfor %}}{{% endset %}}", "y".repeat(50_000)),
        "{{ input.long }}{{ input.long }}{{ input.long }}".to_owned(),
        "{{ range(99999) | map('replace', '1', input.long) | list | length }}".to_owned(),
        "{{ input.long.split('x') | join(input.long) }}".to_owned(),
        "{{ input.long.replace('x', input.long) }}".to_owned(),
        "{{ input.long | regex_replace('x', input.long) }}".to_owned(),
        "{{ range(99999) | map('regex_replace', '(a|b)*c{200}', '') | list }}".to_owned(),
        "{{ [1] | batch(1000000000, 0) }}".to_owned(),
        "{{ ('%s' ~ '%s') | format(input.long, input.long) | truncate(1000000) }}{{ input.long ~ input.long ~ input.long }}".to_owned(),
        "{% for a in range(100000) %}{% if input.long.startswith('y') or input.long.strip() == 'y' %}{% endif %}{% endfor %}".to_owned(),
        "{% for a in range(100000) %}{% if input.long == input.long ~ 'x' %}{% endif %}{% endfor %}".to_owned(),
        "{{ range(99999) | map('tojson', 8) | map('indent', 100, true) | join('\n' * 100) }}".to_owned(),
    ] {
        let shown: String = template.chars().take(100).collect();
        let result = Template::text(&template, &open()).map(|template| run(|vars| template.render(vars)));
        let Ok(Err(error)) = result else { panic!("{shown}: {:?}", result.map(|r| r.map(|t| t.len()))) };
        assert!(!error.is_empty() && error.len() < 300, "{shown}: {error}");
    }
}

#[test]
fn what_would_take_the_parser_too_deep_is_refused() {
    for template in [
        format!("{{{{ {}1 }}}}", "-".repeat(100_000)),
        format!("{{{{ {}true }}}}", "not ".repeat(30_000)),
        format!("{{{{ {}1{} }}}}", "(".repeat(60_000), ")".repeat(60_000)),
        format!("{{{{ input{} }}}}", ".a".repeat(60_000)),
        format!("{{{{ 1{} }}}}", "+1".repeat(60_000)),
        format!("{{{{ 1{} }}}}", "|abs".repeat(30_000)),
        format!("{{% if 1 %}}{}{{% endif %}}", "{% elif 1 %}".repeat(10_000)),
        format!("{}{}", "{% if 1 %}".repeat(5_000), "{% endif %}".repeat(5_000)),
        format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(10_000)),
        "x".repeat(TEMPLATE_MAX_BYTES + 1),
    ] {
        assert!(Template::text(&template, &open()).is_err());
    }
}

/// What a template can be given that nobody meant.
const ODD: &[&str] = &[
    "0",
    "1",
    "-1",
    "10",
    "2.5",
    "0.0",
    "-0.0",
    "1e308",
    "9223372036854775807",
    "(-9223372036854775807 - 1)",
    "170141183460469231731687303715884105727",
    "(-170141183460469231731687303715884105727 - 1)",
    "true",
    "none",
    "''",
    "'abc'",
    "'\u{fc}\u{1F600}'",
    "'99999999999999999999999999999999999999999'",
    "'nan'",
    "'-'",
    "[]",
    "[1, 2, 3]",
    "[1, 'a', none, [2]]",
    "[{'x': 1}, {'x': none}, {}]",
    "{}",
    "{'a': 1, 'b': [2]}",
    "(1, 2)",
    "range(3)",
    "input",
    "input.list",
    "input.brief",
    "input.n",
    "stages.design.output",
];

const OPERATORS: &[&str] =
    &["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or"];

fn odd() -> impl proptest::strategy::Strategy<Value = String> {
    use proptest::prelude::*;
    let leaf = proptest::sample::select(ODD).prop_map(str::to_owned);
    let name = |names: &'static [&'static str]| proptest::sample::select(names);
    leaf.prop_recursive(3, 12, 3, move |inner| {
        let few = proptest::collection::vec(inner.clone(), 0..3);
        let one = || inner.clone();
        prop_oneof![
            (one(), name(OPERATORS), one()).prop_map(|(a, op, b)| format!("(({a}) {op} ({b}))")),
            (one(), name(library::FILTERS), few.clone())
                .prop_map(|(value, filter, args)| format!("(({value}) | {filter}({}))", args.join(", "))),
            (one(), name(methods::METHODS), proptest::collection::vec(one(), 0..3))
                .prop_map(|(value, method, args)| format!("(({value}).{method}({}))", args.join(", "))),
            (one(), name(library::TESTS).prop_filter("a name", |test| test.chars().all(char::is_alphabetic)), one())
                .prop_map(|(value, test, arg)| format!("(({value}) is {test} ({arg}))")),
            (one(), name(library::TESTS), one())
                .prop_map(|(value, test, arg)| format!("(({value}) | select('{test}', {arg}) | list)")),
            (
                one(),
                name(&["attribute", "default", "reverse", "case_sensitive", "by", "precision", "base"]),
                one(),
                name(library::FILTERS)
            )
                .prop_map(|(value, key, arg, filter)| format!("(({value}) | {filter}({key}={arg}))")),
            (one(), one(), one(), one()).prop_map(|(value, a, b, c)| format!("(({value})[({a}):({b}):({c})])")),
            (one(), one()).prop_map(|(value, at)| format!("(({value})[({at})])")),
            (one(), one(), one()).prop_map(|(a, b, c)| format!("(range({a}, {b}, {c}) | list)")),
            one().prop_map(|value| format!("(-({value}))")),
            (one(), one()).prop_map(|(a, b)| format!("(({a}) if ({b}))")),
        ]
    })
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(500))]
    #[test]
    fn no_expression_panics_whatever_its_values(expression in odd()) {
        for text in [
            format!("{{{{ {expression} }}}}"),
            format!("{{% for x in {expression} %}}{{{{ loop.changed(x) }}}}{{{{ loop.cycle(*({expression})) }}}}{{% endfor %}}"),
        ] {
            if let Ok(template) = Template::text(&text, &open()) {
                let whole = evaluation::whole(&evaluation::Stop::default(), std::time::Duration::from_mins(1), || {
                    run(|vars| (template.render(vars), template.value(vars)))
                });
                proptest::prop_assert!(whole.is_ok(), "{text}: {whole:?}");
            }
        }
    }
}

#[test]
fn numbers_at_their_ends_give_a_value_or_an_error() {
    let big = "170141183460469231731687303715884105727";
    for (expression, expected) in [
        ("1 is divisibleby 0", Some("false")),
        ("10 is divisibleby input.zero", Some("false")),
        ("[{'x':1}] | selectattr('x','divisibleby',0) | list", Some("[]")),
        (&format!("(-{big}-1) is divisibleby -1"), Some("true")),
        ("9 is divisibleby 3", Some("true")),
        ("7.5 is divisibleby 2.5", Some("true")),
        ("'abc'[::-9223372036854775807]", Some("c")),
        ("'abc'[::-1]", Some("cba")),
        ("'abc'[0:2:-1]", Some("")),
        ("[1, 2, 3, 4][-3:-1]", Some("[2,3]")),
        ("[1, 2, 3, 4][9223372036854775807:]", Some("[]")),
        ("[1, 2, 3, 4][::2] | length", Some("2")),
        ("range(10, 0, -3) | list", Some("[10,7,4,1]")),
        (
            "range(9223372036854775807,-9223372036854775807,-9223372036854775807) | list",
            Some("[9223372036854775807,0]"),
        ),
        ("range(0, 10, 0) | list", None),
        ("range(-9223372036854775807, 9223372036854775807) | list", None),
        ("1 // 0", None),
        ("1 % 0", None),
        ("2 ** 1000000", None),
        ("0 ** -1", None),
    ] {
        let rendered = render(&format!("{{{{ {} }}}}", expression.replace("input.zero", "(input.n - 3)")));
        assert_eq!(rendered.as_deref().ok(), expected, "{expression}: {rendered:?}");
    }
    assert!(render("{% for x in [1] %}{{ loop.cycle() }}{% endfor %}").is_err());
    assert_eq!(render("{% for x in range(4) %}{{ loop.cycle('a', 'b') }}{% endfor %}").as_deref(), Ok("abab"));
}

/// Renders as a whole evaluation with a watchful caller, and says how many units it would have taken.
#[test]
fn what_looks_at_much_data_again_and_again_is_charged_for_it() {
    let again = |inside: &str| format!("{{% for i in range(5000) %}}{inside}{{% endfor %}}");
    for template in [
        again("{% if loop.changed(input.long) %}{% endif %}"),
        again("{% if input.long[i] %}{% endif %}"),
        again("{% if input.long[-1] %}{% endif %}"),
        again("{% if input.long[1:3] %}{% endif %}"),
        again("{% if input.long | last %}{% endif %}"),
        again("{% if 'y' in input.long %}{% endif %}"),
        again("{% if input.long is upper %}{% endif %}"),
        format!("{{% set xs = range(90000) | map('string') | list %}}{}", again("{% if xs[1:2] %}{% endif %}")),
        format!("{{% set xs = range(90000) | reverse %}}{}", again("{% if 'y' in xs %}{% endif %}")),
        format!("{{{{ range(90000) | map('string') | map(attribute='{}') | list | length }}}}", "0.".repeat(500) + "0"),
    ] {
        let shown: String = template.chars().take(120).collect();
        let template = Template::text(&template, &open()).unwrap_or_else(|flaws| panic!("{shown}: {flaws:?}"));
        let error = run(|vars| template.render(vars)).expect_err(&shown);
        assert!(error.contains("bytes of data"), "{shown}: {error}");
    }
}

#[test]
fn naming_one_key_of_a_large_input_costs_that_key() {
    let input = Arc::new(json!({ "b": 1, "a": vec![0; 450_000] }));
    let template = Template::text("{{ input.b }}", &open()).expect("valid");
    let stage = |_: &str| None;
    let vars = Vars { run_id: "r", input: &input, stage: &stage, output: None };
    let texts = evaluation::brief(|| (0..50).map(|_| template.render(&vars)).collect::<Vec<_>>()).expect("small");
    assert!(texts.iter().all(|text| text.as_deref() == Ok("1")));
}

#[test]
fn a_large_rendering_ends_early_inline_and_is_whole_elsewhere() {
    let template = Template::text("{% for i in range(20000) %}{{ i }}{% endfor %}", &open()).expect("valid");
    let brief = evaluation::brief(|| run(|vars| template.render(vars)));
    assert_eq!(brief, Err(evaluation::Unfinished::TooLong));
    let whole = evaluation::whole(&evaluation::Stop::default(), std::time::Duration::from_secs(1), || {
        run(|vars| template.render(vars))
    });
    assert_eq!(whole.map(|text| text.map(|text| text.len())), Ok(Ok(88_890)));
}
