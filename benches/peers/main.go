// Command peer serves ADS with go-control-plane, for benches/fanout: the same resources that Disco serves, handed to it by the
// benchmark over the control connection that the limit server has too.
//
//	peer -cache linear|snapshot
//
// It prints the addresses for streams and for control, and ends with the control connection.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"strconv"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/sotw/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

func main() {
	kind := flag.String("cache", "linear", "linear or snapshot")
	flag.Parse()
	if err := run(*kind); err != nil {
		log.Fatalf("peer: %v", err)
	}
}

// store takes the resources of a type that are new or have changed.
type store interface {
	put(typeURL string, resources map[string]types.Resource) error
}

func run(kind string) error {
	var (
		served  cache.Cache
		holding store
	)
	switch kind {
	case "linear":
		caches := newLinear()
		served, holding = caches.mux(), caches
	case "snapshot":
		snapshots := newSnapshots()
		served, holding = snapshots.cache, snapshots
	default:
		return fmt.Errorf("-cache %s: want linear or snapshot", kind)
	}
	streams, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	control, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(streams.Addr(), control.Addr())
	xds := grpc.NewServer()
	ads := server.NewServer(context.Background(), served, nil, sotw.WithOrderedADS())
	discovery.RegisterAggregatedDiscoveryServiceServer(xds, ads)
	failed := make(chan error, 2)
	go func() { failed <- xds.Serve(streams) }()
	go func() { failed <- steer(control, holding) }()
	return <-failed
}

// steer takes messages of an operation, a byte for the limit server only, a length and a DeltaDiscoveryResponse with
// resources. Each is answered with the operation: an opening when it is served, a change before, as the limit server does.
func steer(control net.Listener, holding store) error {
	const change = 1
	connection, err := control.Accept()
	if err != nil {
		return err
	}
	input := bufio.NewReader(connection)
	for {
		var head [6]byte
		if _, err := io.ReadFull(input, head[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		body := make([]byte, binary.BigEndian.Uint32(head[2:]))
		if _, err := io.ReadFull(input, body); err != nil {
			return err
		}
		answer := func() error {
			_, err := connection.Write(head[:1])
			return err
		}
		if head[0] == change {
			if err := answer(); err != nil {
				return err
			}
		}
		var response discovery.DeltaDiscoveryResponse
		if err := proto.Unmarshal(body, &response); err != nil {
			return err
		}
		resources := make(map[string]types.Resource, len(response.Resources))
		for _, each := range response.Resources {
			resource, err := each.Resource.UnmarshalNew()
			if err != nil {
				return fmt.Errorf("%s: %w", each.Name, err)
			}
			resources[each.Name] = resource
		}
		if err := holding.put(response.TypeUrl, resources); err != nil {
			return err
		}
		if head[0] != change {
			if err := answer(); err != nil {
				return err
			}
		}
	}
}

var served = []string{resource.ClusterType, resource.EndpointType, resource.ListenerType, resource.RouteType}

// linear is one LinearCache for each type.
type linear map[string]*cache.LinearCache

func newLinear() linear {
	caches := linear{}
	for _, typeURL := range served {
		caches[typeURL] = cache.NewLinearCache(typeURL)
	}
	return caches
}

func (caches linear) put(typeURL string, resources map[string]types.Resource) error {
	of, ok := caches[typeURL]
	if !ok {
		return fmt.Errorf("%s is not served", typeURL)
	}
	return of.UpdateResources(resources, nil)
}

func (caches linear) mux() cache.Cache {
	mux := &cache.MuxCache{
		Classify:      func(request *cache.Request) string { return request.GetTypeUrl() },
		ClassifyDelta: func(request *cache.DeltaRequest) string { return request.GetTypeUrl() },
		Caches:        map[string]cache.Cache{},
	}
	for typeURL, of := range caches {
		mux.Caches[typeURL] = of
	}
	return mux
}

// everyone is the one key under which all proxies share a snapshot: a snapshot for each would cost more.
type everyone struct{}

const all = "all"

func (everyone) ID(*core.Node) string { return all }

// snapshots is a SnapshotCache with one snapshot. A change makes a new one, in which only the type that changed has a new
// version.
type snapshots struct {
	cache     cache.SnapshotCache
	resources map[string]map[string]types.Resource
	current   cache.Snapshot
	versions  uint64
}

func newSnapshots() *snapshots {
	return &snapshots{
		cache:     cache.NewSnapshotCache(true, everyone{}, nil),
		resources: map[string]map[string]types.Resource{},
	}
}

func (s *snapshots) put(typeURL string, resources map[string]types.Resource) error {
	of := cache.GetResponseType(typeURL)
	if of == types.UnknownType {
		return fmt.Errorf("%s is not served", typeURL)
	}
	held, ok := s.resources[typeURL]
	if !ok {
		held = map[string]types.Resource{}
		s.resources[typeURL] = held
	}
	for name, resource := range resources {
		held[name] = resource
	}
	items := make([]types.Resource, 0, len(held))
	for _, resource := range held {
		items = append(items, resource)
	}
	s.versions++
	next := cache.Snapshot{Resources: s.current.Resources}
	next.Resources[of] = cache.NewResources(strconv.FormatUint(s.versions, 10), items)
	s.current = next
	return s.cache.SetSnapshot(context.Background(), all, &next)
}
