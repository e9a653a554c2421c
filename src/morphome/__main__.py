from morphome.cli import main

main()
