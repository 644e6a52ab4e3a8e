// Reads lists of peers as programs with hashicorp/raft do, and prints who is in them.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"

	"github.com/hashicorp/raft"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: raft-lists configuration|peers FILE")
	}
	configuration, err := read(os.Args[1], os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	for _, server := range configuration.Servers {
		fmt.Println(server.ID, server.Address, server.Suffrage)
	}
}

func read(kind, file string) (raft.Configuration, error) {
	switch kind {
	case "peers":
		return raft.ReadConfigJSON(file)
	case "configuration":
		return bootstrap(file)
	default:
		return raft.Configuration{}, errors.New("neither configuration nor peers")
	}
}

// BootstrapCluster checks the configuration, which then is what the first server starts with.
func bootstrap(file string) (raft.Configuration, error) {
	var configuration raft.Configuration
	text, err := os.ReadFile(file)
	if err != nil {
		return configuration, err
	}
	if err := json.Unmarshal(text, &configuration); err != nil {
		return configuration, err
	}
	if len(configuration.Servers) == 0 {
		return configuration, errors.New("nobody is in it")
	}
	settings := raft.DefaultConfig()
	settings.LocalID = configuration.Servers[0].ID
	store, snapshots := raft.NewInmemStore(), raft.NewInmemSnapshotStore()
	_, transport := raft.NewInmemTransport(configuration.Servers[0].Address)
	if err := raft.BootstrapCluster(settings, store, store, snapshots, transport, configuration); err != nil {
		return configuration, err
	}
	return raft.GetConfiguration(settings, nil, store, store, snapshots, transport)
}
