# Check the workflows, the other files of .github and CITATION.cff, without a network: make workflows
set -eu
python=$1
schema() {
    name=$1
    shift
    "$python" -m check_jsonschema --builtin-schema "vendor.$name" "$@"
}
schema github-workflows .github/workflows/*.yml
schema dependabot .github/dependabot.yml
schema github-issue-forms .github/ISSUE_TEMPLATE/*.yml
schema citation-file-format CITATION.cff
build/site-tools/bin/zizmor --offline --quiet --min-severity low .github
